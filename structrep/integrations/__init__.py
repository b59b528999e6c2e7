"""structrep in the training loops of others: a callback for Lightning's `Trainer`, and one for that of transformers.

Each module imports the library that it is for, and nothing else in structrep does.
"""
