"""Where models come from: folders and hubs, their formats, and what is trusted of them."""
