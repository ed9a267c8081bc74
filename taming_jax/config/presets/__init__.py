"""The presets: one module each, with its settings as `CONFIG`."""

# The presets for a GPU, each with the one that a CPU can train.
CPU_PRESETS = {
    "mnist": "mnist_tiny",
    "birds": "birds_tiny",
    "flowers": "birds_tiny",
    "animals": "birds_tiny",
    "folder": "birds_tiny",
}
