"""Hooks that serving engines load themselves, each through the engine's own plugin entry point."""
