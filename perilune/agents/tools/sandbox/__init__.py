"""Places where a model's Python runs without reaching anything else.

monty       a small Python of its own in worker processes: no files, no network, no packages
process     the real Python in namespaces of Linux: packages, a private folder, no network
child       what runs inside of `process`
"""
