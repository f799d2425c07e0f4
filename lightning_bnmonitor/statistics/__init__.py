"""The mathematics, on tensors and arrays: it knows neither a model's layers nor processes.

In: the mean and variance of single batches, weights of the running average, running statistics before and after.
Out: exact moments (:mod:`moments`), a window as at most 16 blocks of batches (:mod:`window`, :mod:`blocks`), what these
say of noise, lag and drift (:mod:`analysis`), distances (:mod:`divergence`), what several ranks saw (:mod:`pooling`).
The method, with its formulas and what is not established, stands in :mod:`analysis`.
"""
