"""What server and sites share: groups of parameters, their exact mean, messages, and what may leave a site."""
