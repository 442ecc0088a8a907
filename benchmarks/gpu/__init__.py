"""What ``benchmarks/gpu_check.py`` does on a machine with a GPU, and what is prepared for it elsewhere.

Read ``plans.py`` first: what runs, in which order, for how long. ``runner.py`` has the rules of time, ``report.py``
the files that are left. Here and in ``steps/`` is only the standard library, for it starts before anything is
installed; ``workers/`` runs in processes of its own, with torch and metafast.
"""
