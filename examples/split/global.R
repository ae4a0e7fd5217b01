# Runs once for each R process, before ui.R and server.R.
periods <- c("Whole series" = 0, "First half" = 1, "Second half" = 2)
