"""What a window has shown, as plain values, tables, texts and pictures.

In: per layer its statistics, its running statistics and a diagnosis. Out: :class:`~.layer_report.LayerReport` (one
layer), :class:`~.report.Report` (all of them), tables and texts (:mod:`tables`), figures (:mod:`figures`);
:class:`~.history.History` (all windows), and its picture (:mod:`heatmap`). Nothing here knows a module.
"""
