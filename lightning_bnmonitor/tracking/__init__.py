"""``BatchNormTracker``: from the calls of a model's layers to a report, on one rank or on several.

In: a model (:mod:`discovery` finds its layers) whose hooks stash batch moments; running statistics (:mod:`buffers`).
Out: a :class:`~lightning_bnmonitor.report.report.Report`, and a state for checkpoints.

The ways of the data:

- **A batch**: hook → ``stash`` → (enough of them: ``Tracker.step``) → ``Tracker.flush`` → :class:`~.windows.Windows` takes
  what waits, merges it and commits all in one step.
- **A report**: ``assess`` = measure (:mod:`measurement`: blocks, running statistics → numbers) → what all ranks have seen
  is gathered → described (:mod:`assessment`: numbers → diagnosis → ``LayerReport``) → broadcast (:mod:`exchange`).
- **A validation batch**: hook → ``ValidationCalls.add`` (pooled, O(C)) → at the end ``with_validation``: pooled over
  ranks → numbers → :func:`~lightning_bnmonitor.diagnosis.diagnosis.diagnose_validation` → the report of the window.
- **A checkpoint**: ``Tracker.state_dict`` = the windows' rows + what each layer keeps; loaded before ``attach`` it waits.
"""
