"""The presets: one per module, with its settings in `CONFIG`."""
