"""The inner compilers: each has the rewritten graph run. One file each; :mod:`tpfuse.backend` chooses by ``tpfuse.inner``."""
