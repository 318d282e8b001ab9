"""Starting training: on this machine, over a rack. Imports nothing by itself."""
