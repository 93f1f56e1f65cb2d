"""Which representation is better, and why? Backbones examined on the same images, tested in pairs, on one page."""
