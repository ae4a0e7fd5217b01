# Takes a CSV file, shows its first rows, and gives a summary of its columns back as a download.
library(shiny)

options(shiny.maxRequestSize = 50 * 1024^2)

ui <- fluidPage(
  titlePanel("Summary of a CSV file"),
  fileInput("file", "CSV file", accept = ".csv"),
  tableOutput("first_rows"),
  downloadButton("download", "Download the summary")
)

server <- function(input, output, session) {
  table <- reactive({
    req(input$file)
    tryCatch(read.csv(input$file$datapath),
             error = function(condition) validate(need(FALSE, paste("Not a CSV file:", conditionMessage(condition)))))
  })
  output$first_rows <- renderTable(head(table()))
  output$download <- downloadHandler(
    filename = function() paste0("summary-of-", tools::file_path_sans_ext(input$file$name), ".csv"),
    content = function(path) {
      columns <- table()
      write.csv(data.frame(column = names(columns), type = vapply(columns, function(x) class(x)[1], ""),
                           missing = vapply(columns, function(x) sum(is.na(x)), 0L)), path, row.names = FALSE)
    }
  )
}

shinyApp(ui, server)
