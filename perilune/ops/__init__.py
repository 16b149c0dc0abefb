"""Functions of tensors: no parameters, no configuration. Each op is a folder with an oracle and fast paths behind one front door."""
