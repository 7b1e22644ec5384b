"""Parts that server and sites share: groups of parameters, coding of updates, messages, and the release of replies."""
