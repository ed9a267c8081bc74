"""The presets: one module each, with its settings as `CONFIG`."""
