function(input, output, session) {
  series <- reactive(select_period(sunspot.year, input$period))
  output$summary <- renderText(sprintf("%d years, %.1f spots on average", length(series()), mean(series())))
  output$plot <- renderPlot(plot(series(), type = "l", xlab = "Year of the period", ylab = "Sunspots"))
}
