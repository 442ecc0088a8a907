"""The GPU check: what ``benchmarks/gpu_check.py`` does on a machine with a GPU, and ``make gpu-pack`` before that.

Read ``plans.py`` first, which says what runs, in which order and for how long. ``runner.py`` has the rules of time, and
``report.py`` writes the files. The check starts before anything is installed, so it and ``steps/`` use only the
standard library; ``workers/`` runs in processes of its own, with torch and metafast.
"""
