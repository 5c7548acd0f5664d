"""Named checks of captions: of their form, their language, against labels, against each other and over the whole set."""
