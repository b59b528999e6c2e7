"""From a module to graphs that can be read: torch.fx, with what stock fx does not do.

* Parameters and buffers stay real tensors. What depends on them alone (DO-Conv, DiracNet, weight norm, a frozen norm's
  scale) is computed as the trace runs and arrives as a constant; how it was computed is kept as its `Origin`.
* The trace runs on a throwaway copy that shares the model's storage but none of its objects, so the user's module never
  notices, whatever its forward writes to itself.
* Where a forward cannot be followed, the innermost function or module type that stopped it is kept whole and tracing
  tries again; the children of a module that was kept whole are traced apart.
* Every module call is recorded, so that a module's own forward can be cut out of the flat graph again.
"""
