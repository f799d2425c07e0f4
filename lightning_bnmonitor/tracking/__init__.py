"""``BatchNormTracker``: from the calls of a model's layers to a report, on one rank or on several.

In: a model (:mod:`discovery` finds its layers) whose hooks stash batch moments; running statistics (:mod:`buffers`).
Out: a :class:`~lightning_bnmonitor.report.report.Report`, and a state for checkpoints.

The ways of the data:

- **A batch**: hook → ``stash`` (with the number of its group, if it was told of one) → (enough wait, and a step ends)
  ``Recorder.flush`` → ``Windows.merge``: what waits of all layers becomes rows of blocks, in one step → (the window
  ends) numbers → ``LayerReport`` → the callback's loggers.
- **A window's end**: the callback's schedule → ``BatchNormTracker.close`` → ``Recorder.end_window`` → ``assess``: each
  rank measures (:mod:`measurement`) → what all have seen goes to rank 0, which describes it (:mod:`assessment`) → its
  reports go to all (:mod:`exchange`). On one rank the same, without the way there and back.
- **A mask**: ``see_inputs`` asks for it → a hook beside the layer's fits it and takes the moments of what counts →
  ``Paddings`` → with the report, beside the window's numbers.
- **A validation batch**: hook → ``PooledCalls.add`` → (the validation ends) pooled over ranks (:mod:`validation`) →
  numbers → :func:`~lightning_bnmonitor.diagnosis.validation.diagnose_validation` → the report of the window.
- **A checkpoint**: ``Recorder.state`` = the windows' rows and what each layer keeps → ``load_state_dict`` → at
  ``attach`` the same rows in new windows. It is per rank; no rank waits for another.
"""
