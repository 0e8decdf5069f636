import react from '@vitejs/plugin-react'
import { defineConfig } from 'vite'

// While the page itself is being worked on: `npm run dev` beside a running `preview-orchestrator dev`.
const stack = 'http://127.0.0.1:54321'
const paths = ['/editor.json', '/auth', '/rest', '/storage', '/realtime', '/v1']

export default defineConfig({
  base: './',
  plugins: [react()],
  build: { target: 'es2023', chunkSizeWarningLimit: 900 },
  server: { port: 5180, proxy: Object.fromEntries(paths.map((path) => [path, { target: stack, changeOrigin: true, ws: true }])) },
})
