"""Pictures and clips: whatever holds one, to PIL; videos read, and laid out as one picture."""
