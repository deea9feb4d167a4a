"""Lightning's classes of whichever package is installed, and its private parts; nothing else imports Lightning."""
