"""What makes the package fit into other tools, one file or folder a tool."""
