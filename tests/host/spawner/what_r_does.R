# An app that does once what apps do, and tells of each: "DID <what>: yes", or why not.

report <- function(what, code)
  cat("DID ", what, ": ", tryCatch(if (isTRUE(code)) "yes" else "no", error = conditionMessage), "\n", sep = "")

drawn <- function(open, ...) {
  file <- tempfile()
  open(file, ...)
  plot(1:9)
  dev.off()
  file.size(file) > 1000
}

python <- function(code) system2("/usr/bin/python3", c("-I", "-c", shQuote(code))) == 0

report("png", drawn(png))
report("png by cairo", drawn(png, type = "cairo"))
report("jpeg", drawn(jpeg))
report("tiff", drawn(tiff))
report("bmp", drawn(bmp))
report("svg", drawn(svg))
report("pdf", drawn(pdf))
report("pdf by cairo", drawn(cairo_pdf))
report("postscript", drawn(postscript))
report("postscript by cairo", drawn(cairo_ps))

report("ggplot2", {
  suppressPackageStartupMessages(library(ggplot2))
  file <- tempfile(fileext = ".png")
  suppressMessages(ggsave(file, ggplot(mpg, aes(displ, hwy, colour = class)) + geom_point() + geom_smooth(method = "lm")))
  file.size(file) > 10000
})

report("data.table with threads", {
  suppressPackageStartupMessages(library(data.table))
  setDTthreads(2)
  table <- data.table(group = sample(1e4, 1e6, TRUE), value = runif(1e6))
  file <- tempfile()
  fwrite(table, file)
  getDTthreads() == 2 && nrow(fread(file)[, .(mean(value)), keyby = group]) == 1e4
})

report("linear algebra", {
  matrix <- crossprod(matrix(rnorm(250000), 500))
  all.equal(solve(matrix) %*% matrix, diag(500), tolerance = 1e-3)
})

report("mclapply", identical(parallel::mclapply(1:8, function(i) i^2, mc.cores = 4), as.list((1:8)^2)))
report("mcparallel", identical(unname(parallel::mccollect(parallel::mcparallel(6 * 7))), list(42)))
report("a cluster of R processes", {
  cluster <- parallel::makePSOCKcluster(2)
  squares <- parallel::parSapply(cluster, 1:4, function(i) i^2)
  parallel::stopCluster(cluster)
  identical(squares, c(1, 4, 9, 16))
})
report("counting cores", parallel::detectCores() >= 1)

report("system2", identical(system2("echo", "hello", stdout = TRUE), "hello"))
report("a shell's pipe", identical(system("printf shiny | tr a-z A-Z | sort", intern = TRUE), "SHINY"))
report("system with a time limit", suppressWarnings(system("sleep 60", timeout = 1)) == 124)
report("system without waiting", system("sleep 0.1", wait = FALSE) == 0)
report("pipe", {
  pipe <- pipe("echo hello")
  line <- readLines(pipe)
  close(pipe)
  identical(line, "hello")
})
report("fifo", {
  system("mkfifo /tmp/queue")
  queue <- fifo("/tmp/queue", "w+")
  writeLines("hello", queue)
  line <- readLines(queue, 1)
  close(queue)
  identical(line, "hello")
})
report("sockets", {
  port <- 20000 + as.integer(Sys.time()) %% 10000
  server <- serverSocket(port)
  client <- socketConnection(port = port, blocking = TRUE)
  other <- socketAccept(server, blocking = TRUE)
  writeLines("hello", client)
  close(client)
  line <- readLines(other)
  close(other)
  close(server)
  identical(line, "hello")
})
report("the machine's addresses", python("import socket; socket.if_nameindex()[0]; socket.getaddrinfo('127.0.0.1', 80)"))

report("environment", {
  Sys.setenv(APP_COLOUR = "blue")
  system('test "$APP_COLOUR" = blue') == 0
})
report("file times, modes and links", {
  time <- as.POSIXct("2020-02-02 20:20:20", tz = "UTC")
  file.create("/tmp/file")
  Sys.setFileTime("/tmp/file", time)
  Sys.chmod("/tmp/file", "0600")
  file.symlink("file", "/tmp/link")
  file.copy("/tmp/file", "/tmp/copy", copy.date = TRUE) && file.rename("/tmp/copy", "/tmp/renamed") &&
    file.mtime("/tmp/renamed") == time && file.mtime("/tmp/link") == time && format(file.mode("/tmp/file")) == "600"
})
report("archives", {
  setwd("/tmp")
  system("tar czf archive.tar.gz file") == 0 && identical(untar("archive.tar.gz", list = TRUE), "file")
})
report("locale and time zone", {
  Sys.setenv(TZ = "Europe/Oslo")
  nchar(Sys.setlocale("LC_COLLATE", "C")) > 0 && format(as.POSIXct(0, origin = "1970-01-01"), "%H") == "01"
})
report("signals", tools::pskill(Sys.getpid(), 0))
report("priority", tools::psnice(value = 5) >= 0 && tools::psnice() == 5)
report("compiling and loading C", {
  writeLines("void twice(int *x) { *x *= 2; }", "twice.c")
  compiled <- system("R CMD SHLIB twice.c > /dev/null 2>&1") == 0
  dyn.load("twice.so")
  compiled && .C("twice", 21L)[[1]] == 42
})
report("SQLite's locks", python("import sqlite3; sqlite3.connect('/tmp/db').executescript('pragma journal_mode=wal; create table t (x)')"))
report("Python's threads", python("import subprocess, threading; threading.Thread(target=subprocess.run, args=['true']).start()"))

cat("FINISHED\n")
quit()
