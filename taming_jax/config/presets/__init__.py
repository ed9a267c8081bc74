"""The presets, one per module, whose settings are its `CONFIG`."""
