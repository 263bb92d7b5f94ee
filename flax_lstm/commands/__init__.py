"""What each command of the command line does; `flax_lstm.cli` parses and calls them."""
