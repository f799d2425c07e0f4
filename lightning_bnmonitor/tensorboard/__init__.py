"""What TensorBoard shows of us beyond its own pages: the events of a run, and a plugin with a tab of its own.

Nothing here imports torch or Lightning, so that TensorBoard starts as fast as without us.
"""
