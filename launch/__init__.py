"""What starts things: the installation, the quickstart, the training program."""
