"""The log joints, a file for each kind of model. All take S draws at once and keep every normalizing constant."""
