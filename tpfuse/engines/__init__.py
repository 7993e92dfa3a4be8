"""Serving engines that load tpfuse themselves, through their own plugin entry points."""
