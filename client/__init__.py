"""ClientApp: a thin relay between Flower and the site."""
