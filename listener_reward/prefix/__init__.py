"""The shared-prefix engine: images and prompt once for a group, then its continuations, exactly."""
