"""Other libraries: one file each, imported by whoever wants it; ``import flowpost`` imports none of them."""
