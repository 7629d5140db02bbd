"""Models by reference: built-in networks, torchvision, timm, torch hub, files, the user's own."""
