"""The command line: one file a command. Commands call public functions only, and import heavy things when they run."""
