"""What the nodes of a graph do, as maps, and maps as layers.

Readers of functions are known by the operation that they read, so their pages are imported here.
"""

from structrep.read import blends, casts, flattened, functions, products, transposed

__all__ = ["blends", "casts", "flattened", "functions", "products", "transposed"]
