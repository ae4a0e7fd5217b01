# A slider that moves a histogram: the first app on a new server.
library(shiny)

ui <- fluidPage(
  titlePanel("Hello from Blockyard"),
  sidebarLayout(
    sidebarPanel(sliderInput("bins", "Number of bins", min = 1, max = 50, value = 30)),
    mainPanel(plotOutput("histogram"))
  )
)

server <- function(input, output, session) {
  message("hello: a session began")
  session$onSessionEnded(function() message("hello: a session ended"))
  output$histogram <- renderPlot({
    message("hello: drawing ", input$bins, " bins")
    waiting <- faithful$waiting
    hist(waiting, breaks = seq(min(waiting), max(waiting), length.out = input$bins + 1),
         col = "#2c7fb8", border = "white", main = NULL, xlab = "Minutes to the next eruption of Old Faithful")
  })
}

shinyApp(ui, server)
