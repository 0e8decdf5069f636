document.body.textContent = 'up'
