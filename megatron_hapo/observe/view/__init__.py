"""The viewer: static pages that show a run's recorded responses, token by token."""
