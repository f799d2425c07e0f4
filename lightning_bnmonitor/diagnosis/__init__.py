"""From a layer's numbers to what is the matter with it: one verdict, flags beside it, an explanation and a remedy.

In: how a layer was called (:class:`~.circumstances.Circumstances`) and its numbers (:mod:`evidence`).
Out: a :class:`~.diagnosis.Diagnosis`. A verdict is one object in the table of :mod:`verdicts`: name, letter, colour,
rule, explanation, remedy; a flag one in that of :mod:`flags`. :mod:`advice` computes the numbers of a remedy,
:mod:`sentences` puts numbers into sentences.
"""
