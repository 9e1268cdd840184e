"""What is learned: one file per method, each a module that turns a batch into a loss."""
