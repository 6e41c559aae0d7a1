"""Where work runs: settings of a command, attaching to or starting Ray, storage, progress."""
