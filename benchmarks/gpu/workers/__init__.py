"""Programs that the steps start by ``python -m``, each in a process of its own. They use torch and metafast."""
