"""One call of a BatchNorm layer → its batch moments, at next to no cost and without changing the training.

What comes in: a model and its BatchNorm layers, which :class:`~.attachment.Attachment` puts forward hooks on, and the
calls that :class:`~.layer_hook.LayerHook` sees of each. What goes out: for each call that counts, mean and spread per
channel and what else is known of it, in the hook's ``stash`` or ``traced``, for whoever merges them; and a sign that
this is due, at the end of a training step. The ways to a call's moments stand in :mod:`.batch_moments`; which is taken
is decided in :mod:`.layer_hook`. Where the user's masks (:mod:`.masks`) tell which values count, :mod:`.masked_calls`
takes the moments of those, too.
"""
