"""Functions in processes of their own: fresh interpreters with limits on time and memory."""
