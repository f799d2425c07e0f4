"""What Lightning's Trainer calls: the only room that knows Lightning.

In come the hooks of a ``fit``: batches, epochs and validations that begin and end. Out go the windows of a tracker as
scalars, pictures and texts for loggers, warnings or an error (``monitor``), and exact running statistics before each
validation (``precise``).
"""
