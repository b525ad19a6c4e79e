"""A reward behind an address: the server, the client, and who waits until a group is complete."""
