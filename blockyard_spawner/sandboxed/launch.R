# Serves the bundle in the working directory on the worker's Unix socket: what R runs in every app's sandbox.
#
#   R --no-echo --no-restore --no-save --no-init-file --file=launch.R
#
# BLOCKYARD_SOCKET   the socket's path, below 108 bytes
# BLOCKYARD_SCRATCH  "1": run from a private, writable copy of the bundle, which counts against the size of /tmp
#
# Exit status: 0 after an interrupt or stopApp(); 1 after an error, with R's own message on standard error.
# All of it is one local(), so that an app finds the global environment as empty as R leaves it.

local({
  temporary <- dirname(tempdir())

  # cp and not file.copy(): that follows links, and one to its own parent would fill the disk.
  enter_scratch_copy <- function() {
    copy <- tempfile("app-", temporary)
    dir.create(copy, mode = "0700")
    if (system2("cp", c("-RP", "--", "./.", shQuote(copy))) != 0L)
      stop("This app runs from a private copy, which has no room: give it a larger /tmp, or turn scratch_copy off.",
           call. = FALSE)
    setwd(copy)
  }

  # Activating renv would hide the worker's libraries, which are chosen outside, behind a project library that is not
  # here. So exactly that does nothing, whether or not the file is there; everything else in .Rprofile counts.
  except_renv <- function(original) {
    function(file, ...) {
      if (!missing(file) && is.character(file) && grepl("(^|/)renv/activate\\.R$", file)) return(invisible())
      call <- sys.call()
      call[[1L]] <- original
      eval.parent(call)
    }
  }

  run_profile <- function() {
    attach(list(source = except_renv(base::source), sys.source = except_renv(base::sys.source)),
           name = "blockyard:profile", warn.conflicts = FALSE)
    on.exit(detach("blockyard:profile", character.only = TRUE))
    sys.source(".Rprofile", globalenv())
    if (is.function(globalenv()$.First)) globalenv()$.First()
  }

  refuse_own_server <- function(url, ...) {
    stop("The app calls runApp() itself; end app.R with shinyApp(ui, server) and leave the running to Blockyard.",
         call. = FALSE)
  }

  # Beside the app's code, where Shiny would put it, nothing can be written.
  bookmarks <- function(id, callback) {
    directory <- file.path(temporary, "shiny_bookmarks", id)
    dir.create(directory, recursive = TRUE, showWarnings = FALSE)
    callback(directory)
  }

  # httpuv drops the WebSockets of a server that stops without a word to their sessions, so onSessionEnded() would
  # never run. Shiny has no public list of its sessions.
  end_sessions <- function() {
    for (session in get("appsByToken", asNamespace("shiny"))$values()) session$wsClosed()
  }

  serve <- function() {
    # A plot outside renderPlot() would open Rplots.pdf in the read-only bundle and fail.
    options(device = function(...) grDevices::pdf(NULL))
    if (identical(Sys.getenv("BLOCKYARD_SCRATCH"), "1")) enter_scratch_copy()
    if (file.exists(".Rprofile")) run_profile()
    suppressPackageStartupMessages(library(shiny))
    # A runApp() in the app's own code listens on TCP, where nobody looks, and then opens a browser: these two.
    options(shiny.autoreload = FALSE, shiny.launch.browser = refuse_own_server, browser = refuse_own_server)
    shinyOptions(save.interface = bookmarks, load.interface = bookmarks)
    socket <- Sys.getenv("BLOCKYARD_SOCKET")
    unlink(socket)
    on.exit(unlink(socket))
    onStop(end_sessions, session = NULL)  # registered before the app's own, so it runs before them
    # The directory, not an object: only so do www/, R/ and global.R count.
    runApp(getwd(), port = structure(socket, mask = strtoi("0117", 8L)), launch.browser = FALSE, quiet = TRUE)
  }

  tryCatch(serve(), interrupt = function(condition) NULL)
  quit(save = "no")
})
