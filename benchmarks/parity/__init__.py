"""Every backend and every operation beside torchvision's and Pillow's, in numbers."""
